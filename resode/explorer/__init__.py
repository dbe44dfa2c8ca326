"""A page to explore stability regions and spectra with, in any browser and without a server."""

from resode.explorer.page import explorer_page
from resode.explorer.spectra import NamedSpectrum, read_spectra, spectra_of, spectra_text

__all__ = ["NamedSpectrum", "explorer_page", "read_spectra", "spectra_of", "spectra_text"]
