"""Model families in plain torch, and how their files are found and read. No transformers at run time."""
