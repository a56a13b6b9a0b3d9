"""Pictures of result tables: every function draws on an ``ax`` that is given, or makes one.

Colours are Okabe and Ito's, which colour-blind readers tell apart; each method keeps its colour
and marker in every picture.
"""

from ngeval.plots.comparison import kfac_figure, plot_ranking, ranking_figure
from ngeval.plots.gamma import damping_figure, plot_damping, plot_stages, stages_figure
from ngeval.plots.imbalance import imbalance_figure, plot_imbalance
from ngeval.plots.layers import layers_figure, plot_layers
from ngeval.plots.performance import performance_figure
from ngeval.plots.style import FIGURE_SUFFIXES, STYLE, save_figure

__all__ = [
    "FIGURE_SUFFIXES",
    "STYLE",
    "damping_figure",
    "imbalance_figure",
    "kfac_figure",
    "layers_figure",
    "performance_figure",
    "plot_damping",
    "plot_imbalance",
    "plot_layers",
    "plot_ranking",
    "plot_stages",
    "ranking_figure",
    "save_figure",
    "stages_figure",
]
