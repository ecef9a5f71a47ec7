"""The closed sets of names that users choose from: the leaf that every package may import."""

from __future__ import annotations

# What a matrix does in the model, and the names under which several roles are selected together.
ROLES = ("gate", "up", "down", "q", "k", "v", "o", "embed", "head", "router", "other")
GROUPS = {"ffn": ("gate", "up", "down"), "attention": ("q", "k", "v", "o")}
