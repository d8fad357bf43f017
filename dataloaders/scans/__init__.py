"""Files in space: reading, DICOM, alignment, preprocessing, conversion, prediction."""
