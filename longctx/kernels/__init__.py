"""The operators. In a checkout each folder here is a link to ``kernels/<operator>``; an installed package has copies.

The folder ``kernels/`` itself is no package: transformers imports another package of that name.
"""
