"""What a model is made of here: Formats, Sites, the normal-form graph and the one new op."""
