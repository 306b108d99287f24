"""The real classes, once for each Lightning: see [Note: two Lightnings]."""
