"""The kernels inside other libraries' models, one instance at a time.

Not called `accelerate`: the function `beit_fast.accelerate` would stand in front of the folder.
"""
