"""Networks for one image, as (init, net): init(key) -> params, net(params, x_t, t, key=None, label=None) -> output.

The only package that uses Flax.
"""
