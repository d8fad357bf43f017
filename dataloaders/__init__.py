"""The data sets: HDF5 files in, batches and evaluation cases out."""
