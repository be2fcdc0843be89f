"""The recorded operations as a graph: values, frontiers, module calls, loops and scans."""
