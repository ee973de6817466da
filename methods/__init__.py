"""Methods fit artifacts from data, one file per method; `kinds` says which edits an artifact of each kind becomes."""
