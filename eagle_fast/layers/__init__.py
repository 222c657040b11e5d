"""What the draft head and the target are both built of; knows neither, and no model family.

attention    what the rows of a forward are (a prompt chunk, a tree), and how they attend
slab         keys and values, written and compacted in place
linear       products of few rows, in 16 bits or int8
transfers    copies between devices
"""
