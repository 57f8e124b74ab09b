use super::super::guide::Vocabulary;
use super::super::tests::{takes, tokenizer};
use super::parse::{Expr, rules};
use super::*;
use proptest::prelude::*;
use std::collections::{BTreeSet, HashMap};
use tier_plan_runtime::tokenizer::Tokenizer;

/// Checks which texts a grammar takes.
fn check(grammar: &str, good: &[&str], bad: &[&str]) {
    let tokenizer = tokenizer();
    let lark = to_lark(grammar).unwrap_or_else(|why| panic!("{why}: {grammar}"));
    let compiled = Vocabulary::new(&tokenizer).unwrap().compile(&lark);
    let compiled = compiled.unwrap_or_else(|why| panic!("{why}: {lark}"));
    for text in good {
        assert!(takes(&compiled, &tokenizer, text), "{text:?}: {lark}");
    }
    for text in bad {
        assert!(!takes(&compiled, &tokenizer, text), "{text:?}: {lark}");
    }
}

#[test]
fn json_is_taken_with_its_own_white_space() {
    let grammar = r#"
        # A value of JSON.
        root ::= value
        value ::= (object | list | text | number | "true" | "false" | "null") gap
        object ::= "{" gap (
            text ":" gap value # the first
            ("," gap text gap ":" gap value)*
        )? "}"
        list ::= "[" gap (value ("," gap value)*)? "]"
        text ::= "\"" ([^"\\\x00-\x1F] | "\\" (["\\bfnrt/] | "u" [0-9a-fA-F]{4}))* "\""
        number ::= "-"? ("0" | [1-9] [0-9]*) ("." [0-9]+)? ([eE] [-+]? [0-9]+)?
        gap ::= [ \t\n]*
    "#;
    check(
        grammar,
        &[
            "null",
            "-12.5e+3 ",
            "\"a\\\"b\\u00e9 \u{1f642}é\"",
            "{}",
            "[1, [true, {\"a\": {\"b\": []}, \"c\" : 0}], \"x,y:]\"]",
            "{\"a\": 1,\n  \"true\": \"null\"}",
        ],
        &[
            "",
            "nul",
            "01",
            "{\"a\": 1,}",
            "{\"a\" : 1}",
            "[1 2]",
            "\"\n\"",
            "\"\\x\"",
            "[1]]",
        ],
    );
}

#[test]
fn sums_and_lists_have_their_structure() {
    check(
        "root ::= (sum \"=\" gap term \"\\n\")+\nsum ::= term ([-+*/] gap term)*\n\
         term ::= name | digits | \"(\" gap sum \")\" gap\nname ::= [a-z] [a-z0-9_]* gap\n\
         digits ::= [0-9]+ gap\ngap ::= [ \\t]*",
        &["a=b\n", "(x1 + (2*y)) / 3 = z\n1=1\n"],
        &["a=b", "a+=b\n", "(a=b\n", "1a=b\n", "a==b\n"],
    );
    check(
        "root ::= item+\nitem ::= \"- \" [^\\r\\n\\x0b\\x0c\\x85\\u2028\\u2029]+ \"\\n\"",
        &["- a\n", "- one - two\n- ½ é\n"],
        &["a\n", "- \n", "- a", "- a\r\n"],
    );
    check(
        "root ::= first \" \" move (\"\\n\" [1-9] [0-9]{0,1} \". \" move \" \" move)*\nfirst ::= \"1. \" move\n\
         move ::= ([NBKQR] [a-h]? | [a-h] \"x\")? [a-h] [1-8] (\"=\" [NBQR])? [+#]? | \"O-O\" \"-O\"?",
        &["1. e4 e5", "1. d4 Nf6\n2. exd5 O-O-O\n12. a8=Q+ Kh1"],
        &["2. e4 e5", "1. e9 e5", "1. e4 e5\n", "1. e4 O-O-"],
    );
}

#[test]
fn what_is_counted_begins_again() {
    // The second time needs a character that the first could have taken.
    check(
        "root ::= (\"a\" root | [^ab]+){2}",
        &["((", "(((", "a((("],
        &["(", "a((", ""],
    );
    check(
        "root ::= [xy]+ root \"c\" | \"b\"",
        &["b", "xbc", "xxbc", "xyxbcc"],
        &["xbcc", "xb", "c"],
    );
    check(
        "root ::= \"(\" root? \")\" ([xy]+ | \"(\" root \")\")*",
        &["()xyx", "()x(())y"],
        &["()x(", "x"],
    );
}

#[test]
fn a_language_may_mix_words_and_names() {
    // Words that are also beginnings of names, operators that begin alike, and comments.
    let grammar = r#"root ::= statement*
statement ::= "return" gap sum ";" | name gap? "=" gap? sum ";" | "while" "(" test ")" "{" statement* "}" | note
note ::= "//" [^\n]* "\n" | "/*" ([^*] | "*" [^/])* "*/"
test ::= sum ("<=" | "<" | "==" | ">") sum
sum ::= part (("+" | "-") part)*
part ::= name | [0-9]+ | "-" part | name "(" (sum ("," gap? sum)*)? ")" | "(" sum ")"
name ::= [a-zA-Z_] [a-zA-Z_0-9]*
gap ::= [ \t\n]+"#;
    check(
        grammar,
        &[
            "",
            "return x;",
            "returned = return1;",
            "while(a<=b){while(whiles<1){x=f(1, g(), -(y+2));}}",
            "// a comment\n/* another * one */return\n1;",
        ],
        &[
            "return;",
            "x=1",
            "while(a){}",
            "x==1;",
            "/* open",
            "while(a<b){return 1;",
        ],
    );
}

#[test]
fn characters_are_those_of_all_scripts() {
    check(
        "root ::= [ぁ-ゟァ-ヿ一-鿿]+ \"\\u3002\" ([\\U0001F600-\\U0001F64F] | . \"\\x21\")?",
        &["ひらがな。", "漢字カナ。🙂", "漢。x!", "漢。\n!"],
        &["latin。", "漢字", "漢。🚀"],
    );
    check(
        "root ::= [^é]+ \"é\" root?",
        &["xé", "aèbé", "xéyé"],
        &["é", "xè", "xéé"],
    );
    check(
        "root ::= \"(\" (root | [^()é]+ | \"é\")* \")\"",
        &["()", "(aé(èb)é)"],
        &["(", "(a))", "é"],
    );
    check(
        "root ::= [a\\]\\-\\[\\\\\"x-] [^\\]-a] \"\\\"\\t\"",
        &["]b\"\t", "-[\"\t", "\\~\"\t"],
        &["a]\"\t", "aa\"\t", "bb\"\t"],
    );
}

#[test]
fn repetitions_have_their_bounds() {
    check(
        "root ::= \"ab\"{2} [0-9]{0,2} \"x\"{1,}",
        &["ababx", "abab12xxx"],
        &["abx", "abab123x", "abab"],
    );
    check(
        "root ::= (\"a\" | \"b\" \"c\"?){2,3} | ",
        &["", "ab", "bcbca"],
        &["a", "abab"],
    );
    check(
        "root ::= \"<\" root{0,2} \">\"",
        &["<>", "<<><<>>>"],
        &["<<><><>>", "<"],
    );
    check(
        "root ::= | \"(\" root \")\" root",
        &["", "()", "(())()"],
        &["(", "())"],
    );
}

#[test]
fn what_is_wrong_has_its_line_or_rule() {
    let deep = format!("root ::= {}\"a\"{}", "(".repeat(100), ")".repeat(100));
    let mut large = String::from("root ::= r0 r0\n");
    for i in 0..40 {
        large += &format!("r{i} ::= r{0} r{0}\n", i + 1);
    }
    large += "r40 ::= \"a\"\n";
    for (grammar, words) in [
        ("", "no rule root"),
        ("a ::= \"b\"", "no rule root"),
        (
            "root ::= (\"a\"\n  other)",
            "line 2: there is no rule other",
        ),
        (
            "root ::= \"a\"\nb := \"c\"",
            "line 2: `:= \"c\"`, expected `::=`",
        ),
        ("root ::= \"a\nb", "line 2: the end, expected `\"`"),
        ("root ::= [z-a]", "line 1: `]`, expected a range in order"),
        (
            "root ::= []",
            "line 1: `[]`, expected a class with a character",
        ),
        ("root ::= (\"a\"", "line 1: the end, expected `)`"),
        ("root ::= \"a\" )", "line 1: `)`, expected the next part"),
        ("root ::= *", "something to repeat"),
        ("root ::= \"a\"{3,2}", "bounds in order"),
        ("root ::= \"a\"{,2}", "expected a number"),
        ("root ::= \"a\"{99999999999}", "at most 2000 repetitions"),
        ("root ::= \"\\q\"", "line 1: `\\q\"`, expected an escape"),
        (
            "root ::= \"\\uD800\"",
            "a character in 4 hexadecimal digits",
        ),
        (
            "root ::= \"\\U0011FFFF\"",
            "a character in 8 hexadecimal digits",
        ),
        ("root ::= <think>", "tokens are not supported"),
        (
            "root ::= \"a\"\nroot ::= \"b\"",
            "line 2: rule root is there twice",
        ),
        (
            "root ::= a\na ::= b \"x\"\nb ::= \"y\"? a",
            "begins with itself",
        ),
        ("root ::= \"a\" b\nb ::= c* b", "there is no rule c"),
        (&deep, "at most 64 parentheses"),
        (&large, "rule r26 is too large or too deep"),
    ] {
        let error = to_lark(grammar).unwrap_err();
        assert!(error.contains(words), "{grammar:.60}: {error}");
    }
}

/// The places where a text that a part takes can end. It is a definition of the language, slow and
/// plain.
fn ends(
    expr: &Expr,
    at: usize,
    text: &[char],
    all: &[super::parse::Rule<'_>],
    known: &mut HashMap<(usize, usize), BTreeSet<usize>>,
) -> BTreeSet<usize> {
    match expr {
        Expr::Chars(chars) => {
            let is_in = |c: &char| chars.meets(&super::chars::Chars::one(*c));
            text.get(at)
                .filter(|c| is_in(c))
                .map(|_| at + 1)
                .into_iter()
                .collect()
        }
        Expr::Seq(parts) => parts.iter().fold(BTreeSet::from([at]), |from, part| {
            from.iter()
                .flat_map(|at| ends(part, *at, text, all, known))
                .collect()
        }),
        Expr::Alt(parts) => parts
            .iter()
            .flat_map(|part| ends(part, at, text, all, known))
            .collect(),
        Expr::Repeat { of, min, max } => {
            let mut found = BTreeSet::new();
            let mut from = BTreeSet::from([at]);
            // More empty ones than there are characters change nothing.
            let most = max.unwrap_or(min + text.len() as u32 + 1);
            for i in 0..=most {
                if i >= *min {
                    found.extend(&from);
                }
                from = from
                    .iter()
                    .flat_map(|at| ends(of, *at, text, all, known))
                    .collect();
            }
            found
        }
        Expr::Rule(number) => {
            if let Some(known) = known.get(&(*number, at)) {
                return known.clone();
            }
            let found = ends(all[*number].body.as_ref().unwrap(), at, text, all, known);
            known.insert((*number, at), found.clone());
            found
        }
    }
}

fn takes_by_definition(grammar: &str, text: &str) -> bool {
    let rules = rules(grammar).unwrap();
    let chars: Vec<char> = text.chars().collect();
    let found = ends(&Expr::Rule(0), 0, &chars, &rules, &mut HashMap::new());
    found.contains(&chars.len())
}

/// Parts of rules over few characters, so that lexemes are at odds.
fn any_part() -> impl Strategy<Value = String> {
    let leaf = prop_oneof![
        "\"[abé]{0,3}\"",
        "\\[[ab]{1,2}\\]",
        "\\[\\^[abé]{1,2}\\]",
        "\\[\\^[abé]{1,2}\\]\\+",
        "x[0-3]",
        Just("\"(\" root \")\"".to_string()),
        Just("\"a\" root".to_string()),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        let many = proptest::collection::vec(inner.clone(), 1..4);
        prop_oneof![
            many.clone().prop_map(|parts| parts.join(" ")),
            many.prop_map(|parts| format!("({})", parts.join(" | "))),
            (inner, "[*+?]|\\{1,2\\}|\\{2\\}").prop_map(|(part, times)| format!("({part}){times}")),
        ]
    })
}

fn any_grammar() -> impl Strategy<Value = String> {
    proptest::collection::vec(any_part(), 5).prop_map(|bodies| {
        let names = ["root", "x0", "x1", "x2", "x3"];
        let rules = names
            .iter()
            .zip(bodies)
            .map(|(name, body)| format!("{name} ::= {body}\n"));
        rules.collect()
    })
}

fn compare(tokenizer: &Tokenizer, vocabulary: &Vocabulary, grammar: &str, texts: &[String]) {
    let Ok(lark) = to_lark(grammar) else {
        return;
    };
    let compiled = vocabulary.compile(&lark);
    for text in texts {
        let expected = takes_by_definition(grammar, text);
        match &compiled {
            Ok(compiled) => {
                let found = takes(compiled, tokenizer, text);
                assert_eq!(found, expected, "{text:?}\n{grammar}\n{lark}");
            }
            // No text goes by it.
            Err(why) => assert!(!expected, "{why}: {text:?}\n{grammar}\n{lark}"),
        }
    }
}

#[test]
fn the_language_is_that_of_the_definition() {
    let tokenizer = tokenizer();
    let vocabulary = Vocabulary::new(&tokenizer).unwrap();
    let n_cases = if tier_plan_testing::is_nightly() {
        2000
    } else {
        150
    };
    let texts = proptest::collection::vec("[ab()é]{0,7}", 12);
    proptest!(ProptestConfig::with_cases(n_cases), |(grammar in any_grammar(), texts in texts)| {
        compare(&tokenizer, &vocabulary, &grammar, &texts);
    });
}

proptest! {
    #[test]
    fn any_text_is_a_grammar_or_refused(text in "\\PC{0,60}", more in "(root|x|::=|[ \n\"\\[\\]\\\\^*+?{}0-9,|()a-z<!#-]){0,60}") {
        for text in [&text, &more, &format!("root ::= {more}")] {
            if let Err(error) = to_lark(text) {
                prop_assert!(error.chars().count() < 200, "{error}");
            }
        }
    }
}
