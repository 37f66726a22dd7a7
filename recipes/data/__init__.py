"""Data for the recipes.

Text from files or datasets becomes tokens once per node, and tokens become batches in an order that resumes
exactly.
"""

from recipes.data.datamodule import CorpusSummary, TextDataModule
from recipes.data.samples import Objective
from recipes.data.tokenizer import SpecialToken

__all__ = ["CorpusSummary", "Objective", "SpecialToken", "TextDataModule"]
