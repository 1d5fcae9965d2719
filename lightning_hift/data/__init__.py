"""DataModules."""

from lightning_hift.data.python_source import PythonSourceDataModule, order0_bits_per_byte

__all__ = ["PythonSourceDataModule", "order0_bits_per_byte"]
