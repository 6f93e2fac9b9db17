"""Names, differences and checksums of the leaves of a pytree, and its layout in a checkpoint."""

import zlib

import jax
import numpy as np


def name(path):
    """The path of a leaf as text, such as block/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flat(tree):
    """{name: leaf} of nested dicts; everything that is not a dict is a leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: not isinstance(node, dict))
    return {name(path): leaf for path, leaf in leaves}


def nested(tree):
    """Any tree as nested dicts, keyed by the parts of the leaves' names: the layout in a checkpoint."""
    root = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *parents, last = name(path).split("/")
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return root


def like(template, tree):
    """Nested dicts as a tree with the structure of `template`: the inverse of `nested`."""
    leaves = flat(tree)
    return jax.tree_util.tree_map_with_path(lambda path, _: leaves[name(path)], template)


def differences(one, other, text):
    """`text` formatted with (name, leaf of one, leaf of the other), for each name where they differ."""
    one, other = flat(one), flat(other)
    pairs = [(name, one.get(name, "missing"), other.get(name, "missing")) for name in sorted({*one, *other})]
    return [text.format(name, a, b) for name, a, b in pairs if a != b]


def not_finite(tree):
    """The names of the arrays that contain NaN or infinity."""
    return [name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if not np.isfinite(leaf).all()]


def digest(tree, map=map):
    """CRC-32 of the names, types, shapes and CRC-32s of a tree's arrays; parallel with the `map` of a thread pool."""

    def line(item):
        path, leaf = item
        leaf = np.asarray(leaf)
        crc = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8))
        return f"{name(path)} {leaf.dtype} {leaf.shape} {crc}"

    return zlib.crc32("\n".join(map(line, jax.tree_util.tree_leaves_with_path(tree))).encode())
