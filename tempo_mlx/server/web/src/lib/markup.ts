/** A text as it was meant: prose, code, or Markdown. Forks keep their place in each. */

import DOMPurify from 'dompurify'
import { Marked } from 'marked'
import type { Phrase } from './run'

export type Format = 'prose' | 'markdown' | 'code'

const FENCE = /^ {0,3}(```|~~~)/m
const CODE = /^\s*(def|class|import|from \w+ import|#include|function|const|let|var|public|package|func|fn|SELECT)\b/

/** What a text most likely is, by how it was asked for and what it looks like. */
export function formatOf(prompt: string, text: string, chat: boolean): Format {
  if (chat || FENCE.test(text)) return 'markdown'
  return CODE.test(prompt) ? 'code' : 'prose'
}

// A fork stands in the source as its number between two private characters, which Markdown takes for a word.
const [OPEN, CLOSE] = ['\uE000', '\uE001']
const FORKS = new RegExp(`${OPEN}(\\d+)${CLOSE}`, 'g')
const PRIVATE = new RegExp(`[${OPEN}${CLOSE}]`, 'g')

const marked = new Marked({
  gfm: true,
  renderer: {
    html: ({ text }) => escaped(text), // what a model writes is no part of this page
    link({ href, tokens }) {
      const words = this.parser.parseInline(tokens)
      return `<a href="${escaped(href)}" target="_blank" rel="noreferrer">${words}</a>`
    },
    image: ({ text, href }) => escaped(`${text} (${href})`),
  },
})

/** Markdown as sanitised HTML. Forks are spans that can be pressed, with `data-fork`; `tail`: what may still change. */
export function markdown(phrases: readonly Phrase[], tail: string, show: (text: string) => string): string {
  const bare = (text: string) => show(text.replace(PRIVATE, ''))
  const source = phrases.map(({ text, alternatives }, at) => {
    if (alternatives.length === 0) return bare(text)
    const [, before, word, after] = /^(\s*)([^]*?)(\s*)$/.exec(text)!
    return word ? `${before}${OPEN}${at}${CLOSE}${after}` : bare(text)
  })
  const plain = (text: string) => text.replace(FORKS, (_, at: string) => phrases[Number(at)]!.text.trim())
  const html = marked.parse(source.join('') + bare(tail), {
    async: false,
    // An address and the name of a code's language are no place for a fork.
    walkTokens(token) {
      if (token.type === 'link' || token.type === 'image') token.href = plain(token.href as string)
      else if (token.type === 'code' && token.lang) token.lang = plain(token.lang as string)
    },
  })
  const forked = html.replace(FORKS, (_, at: string) => {
    const text = escaped(bare(phrases[Number(at)]!.text.trim()))
    return `<span class="fork" role="button" tabindex="0" aria-haspopup="dialog" data-fork="${at}">${text}</span>`
  })
  return DOMPurify.sanitize(forked, { ADD_ATTR: ['target'], FORBID_TAGS: ['style', 'form', 'input', 'img'] })
}

function escaped(text: string): string {
  return text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`)
}
