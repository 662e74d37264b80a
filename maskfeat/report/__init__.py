"""The report of one run or several: a page and a table, made from the files of OUTPUT_DIR alone."""
