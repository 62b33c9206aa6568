"""Semantic segmentation: training, evaluation, prediction."""
