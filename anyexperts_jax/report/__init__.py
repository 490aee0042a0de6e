"""What people look at: tables, pictures, importance maps and the report page."""
