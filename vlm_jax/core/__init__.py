"""Floor 0: documents, fields, layouts, batches, masks, protocols, precision, mesh rules, errors."""
