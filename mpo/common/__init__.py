"""What every room uses: files, words on the screen, statistics, tables, figures. Knows nothing of models."""
