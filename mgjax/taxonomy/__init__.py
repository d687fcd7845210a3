"""Taxonomies: the class itself, files of them, WordNet's, and those induced from a model."""

from mgjax.taxonomy.core import UNKNOWN, Taxonomy, TaxonomyError
from mgjax.taxonomy.files import read_taxonomy, write_taxonomy

__all__ = ["UNKNOWN", "Taxonomy", "TaxonomyError", "read_taxonomy", "write_taxonomy"]
