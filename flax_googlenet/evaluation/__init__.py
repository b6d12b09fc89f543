"""Measuring how good networks are: crops, ensembles and the confusion matrix."""
