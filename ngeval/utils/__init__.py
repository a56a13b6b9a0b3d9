"""Small tools that know no model: files, memory, processes, texts, lazy imports."""
