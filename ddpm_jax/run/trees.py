"""Names, differences and checksums of the leaves of a tree, and its form in a checkpoint."""

import zlib

import jax
import numpy as np


def name(path):
    """The path of a leaf as text, block/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flat(tree):
    """{name: leaf} of the leaves of nested dicts, everything else counting as a leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: not isinstance(node, dict))
    return {name(path): leaf for path, leaf in leaves}


def nested(tree):
    """The leaves of any tree in nested dicts by the parts of their names, as they lie in a checkpoint."""
    root = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *parents, last = name(path).split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return root


def like(template, tree):
    """The leaves of nested dicts in the structure of `template`: the inverse of `nested`."""
    leaves = flat(tree)
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[name(path)], template)


def differences(one, other, text):
    """`text` filled with (name, its leaf in one, in the other) for each name whose leaves differ."""
    one, other = flat(one), flat(other)
    pairs = [(name, one.get(name, "missing"), other.get(name, "missing")) for name in sorted({*one, *other})]
    return [text.format(name, a, b) for name, a, b in pairs if a != b]


def not_finite(tree):
    """The names of the arrays with values that are not finite."""
    return [name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if not np.isfinite(leaf).all()]


def digest(tree, map=map):
    """CRC-32 over the names, types, shapes and contents of a tree's arrays; the `map` of a thread pool shares the work.

    Of each array's contents their own CRC-32.
    """

    def line(item):
        path, leaf = item
        leaf = np.asarray(leaf)
        crc = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
        return f"{name(path)} {leaf.dtype} {leaf.shape} {crc}"

    return zlib.crc32("\n".join(map(line, jax.tree_util.tree_leaves_with_path(tree))).encode())
