"""Measuring runs: TREC files, ir_measures, significance, ROC curves, reports, reproductions."""
