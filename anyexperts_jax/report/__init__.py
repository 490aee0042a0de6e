"""Tables, charts, importance maps and the report page."""
