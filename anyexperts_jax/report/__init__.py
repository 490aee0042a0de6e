"""Output for people: tables, charts, importance maps and the report page."""
