"""Plotly figures: functions take data, return a Figure, and never show it."""
