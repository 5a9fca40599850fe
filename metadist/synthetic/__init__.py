"""What is learned: distilled images, their labels and rates; and the set that a run hands back."""

from metadist.synthetic.distilled import DistilledSet, load

__all__ = ["DistilledSet", "load"]
