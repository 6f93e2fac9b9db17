"""Networks of one image, (init, net): init(key) -> params, net(params, x_t, t, key=None, label=None) -> output.

The only room that says Flax.
"""
