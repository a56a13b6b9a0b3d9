"""A random search for wrong numbers: ``python -m tests.search --problems N --seed S``.

`problems` draws models, batches and settings, `right` computes what each row should say in ball
arithmetic, `judge` compares. Nothing here imports what ngeval computes its numbers with.
"""
