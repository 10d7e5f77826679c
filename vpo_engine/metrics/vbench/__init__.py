"""The seven dimensions of VBench (Vchitect/VBench, arXiv 2311.17982) that the OnlineVPO paper reports."""
