"""Result files: tables, the journal of a run, manifests, hashes."""
