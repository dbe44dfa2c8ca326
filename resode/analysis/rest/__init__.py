"""Where does a field rest, and how does it leave?"""
