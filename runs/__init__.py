"""Running the comparison: cells, records, the leaderboard.

``python -m runs.compare`` plans cells, ``runs.execute`` turns each into a record under ``results/<key>/``, and
``runs.report`` draws the leaderboard from records alone. Importing this package imports nothing heavy.
"""
