"""The base of all adapters, under the name that code of the original Refiners imports it by."""

from refiners.fluxion.layers.adapter import Adapter, lookup_top_adapter

__all__ = ["Adapter", "lookup_top_adapter"]
