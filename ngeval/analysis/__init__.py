"""Statistics of result tables: tables in, numbers out, without torch."""
