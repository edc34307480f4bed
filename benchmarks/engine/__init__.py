"""The engine: figures with intervals instead of means, exact counts where something can be counted.

It knows nothing of Refiners. `figures` decides, `contestants` times, `counts`, `memory` and `processes` count.
"""
