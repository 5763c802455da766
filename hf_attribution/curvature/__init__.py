"""Curvature: solvers and operators shared by influence functions and their approximations."""
