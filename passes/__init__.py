"""From model to packed weights, and graph to graph; `pipeline.py` lists it all in order."""
