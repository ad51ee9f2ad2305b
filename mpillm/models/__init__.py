"""Model families: settings in, a list of layers out."""
