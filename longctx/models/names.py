"""Names under which transformers knows longctx; importable without torch."""

NAME = "longctx"
"""of the attention and mask functions: ``attn_implementation="longctx"``"""
PREFIX = "longctx_"
"""of the model types of converted models: ``longctx_llama``"""
