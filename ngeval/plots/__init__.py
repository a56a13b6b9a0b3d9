"""Pictures of result tables, for papers and notebooks.

Every ``plot_*`` draws on a given ``ax``, or makes one, and returns it; every ``*_figure`` is a
whole picture, at its printed width. Colours are those of Okabe and Ito, which colour-blind readers
can distinguish; each method has the same colour and marker in every picture.
``plt.style.use("ngeval.plots.ngeval")`` gives other pictures the same style.
"""

from ngeval.plots.gamma import damping_figure, plot_damping, plot_stages
from ngeval.plots.imbalance import norms_figure, plot_imbalance, plot_norms
from ngeval.plots.kinds import FIGURES, Chosen, figure_of, kind_of
from ngeval.plots.layers import layers_figure, plot_layers
from ngeval.plots.ranking import kfac_figure, plot_ranking, ranking_figure
from ngeval.plots.stages import plot_relative, stages_figure
from ngeval.plots.style import COLUMN, FIGURE_SUFFIXES, PAGE, STYLE, save_figure

__all__ = [
    "COLUMN",
    "FIGURES",
    "FIGURE_SUFFIXES",
    "PAGE",
    "STYLE",
    "Chosen",
    "damping_figure",
    "figure_of",
    "kfac_figure",
    "kind_of",
    "layers_figure",
    "norms_figure",
    "plot_damping",
    "plot_imbalance",
    "plot_layers",
    "plot_norms",
    "plot_ranking",
    "plot_relative",
    "plot_stages",
    "ranking_figure",
    "save_figure",
    "stages_figure",
]
