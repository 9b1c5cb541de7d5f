"""Floor 1: documents from prepared files to packed numpy batches."""
