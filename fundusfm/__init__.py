"""fundusfm: pretraining of ophthalmic foundation models over tar shards of exams."""

__version__ = "0.1.0"
