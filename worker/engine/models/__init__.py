"""One transformer; a thin file per family maps config and tensor names onto it."""
