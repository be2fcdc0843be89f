"""The report as one HTML file that opens from disk: verdict first, then depth as the spine."""

from stabkit.report.page.rendering import comparison_page, report_page

__all__ = ["comparison_page", "report_page"]
