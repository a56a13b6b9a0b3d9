"""The commands of ``ngeval``, one file for those that belong together; `ngeval.cli` lists them."""
