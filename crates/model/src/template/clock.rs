//! `strftime_now`, which some templates use to tell the model the date. In UTC: there is no portable way to the local
//! time zone without another dependency, and a date is all that templates ask for.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

pub(super) fn strftime_now(format: &str) -> Result<String, Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    strftime(format, now)
}

/// `seconds` since 1970 in Python's notation; what is not known is an error.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = date(days);
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(ch) = rest.next() {
        if ch != '%' {
            out.push(ch);
            continue;
        }
        let mut code = rest.next();
        let bare = code == Some('-');
        if bare {
            code = rest.next();
        }
        let two = |n: u64| if bare { n.to_string() } else { format!("{n:02}") };
        let month_name = MONTHS[month as usize - 1];
        // 1970 began on a Thursday.
        let day_name = DAYS[((days + 4) % 7) as usize];
        out += &match code {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('e') => format!("{day:2}"),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => two(second / 3600),
            Some('I') => two((second / 3600 + 11) % 12 + 1),
            Some('p') => if second < 43_200 { "AM" } else { "PM" }.to_owned(),
            Some('M') => two(second / 60 % 60),
            Some('S') => two(second % 60),
            Some('%') => "%".to_owned(),
            other => {
                let code: String = other.into_iter().collect();
                let problem =
                    format!("strftime_now: %{code} is not supported; supported: Y y m d e B b A a H I p M S %");
                return Err(Error::new(ErrorKind::InvalidOperation, problem));
            }
        };
    }
    Ok(out)
}

/// Year, month from 1, day from 1 of a day since 1970-01-01, by eras of 400 years that begin in March.
fn date(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, in_era) = (z / 146_097, z % 146_097);
    let year = (in_era - in_era / 1460 + in_era / 36_524 - in_era / 146_096) / 365;
    let in_year = in_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * in_year + 2) / 153;
    let day = in_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    (year + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let all = "%Y-%m-%d %H:%M:%S %B %b %A %a %y %e %-d %I %p %%";
        assert_eq!(strftime(all, 0).unwrap(), "1970-01-01 00:00:00 January Jan Thursday Thu 70  1 1 12 AM %");
        let leap = strftime("%d %b %Y, %A %I %p", 1_709_214_296).unwrap();
        assert_eq!(leap, "29 Feb 2024, Thursday 01 PM");
        assert_eq!(strftime("%Y-%m-%d", 4_107_542_399).unwrap(), "2100-02-28");
        assert_eq!(strftime("%Y-%m-%d", 4_107_542_400).unwrap(), "2100-03-01");
        for bad in ["%Q", "%", "%-"] {
            assert!(strftime(bad, 0).unwrap_err().to_string().contains("supported"));
        }
    }
}
