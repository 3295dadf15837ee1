"""The scripts that a person runs, and what they share: config, data, evaluation, reconstruction, files."""
