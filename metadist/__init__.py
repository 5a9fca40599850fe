"""metadist learns the data that trains networks: dataset distillation by exact meta-gradients, on one core or many nodes."""

__version__ = "0.1.0"
