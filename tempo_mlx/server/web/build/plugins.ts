/** Vite plugins that finish the build: a strict policy for the page, the page as one file, and what it was built from. */

import { createHash } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import type { Plugin, Rolldown } from 'vite'

const POLICY = "default-src 'none'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'"

/** `index.html` with a policy that allows the page's own files only. */
export function pageBuild(): Plugin {
  return {
    name: 'page',
    apply: 'build',
    enforce: 'post',
    generateBundle(_, bundle) {
      const page = bundle['index.html'] as Rolldown.OutputAsset
      page.source = withPolicy(String(page.source), `${POLICY}; script-src 'self'; style-src 'self'`)
      this.emitFile({ type: 'asset', fileName: 'SOURCES.sha256', source: `${hashOfSources(process.cwd())}\n` })
    },
  }
}

/** `<tempo-run>` as one script with its styles in it, and `standalone.html`: that script, and a place for a run. */
export function elementBuild(): Plugin {
  return {
    name: 'element',
    apply: 'build',
    enforce: 'post',
    generateBundle(_, bundle) {
      const script = Object.values(bundle).find((file) => file.type === 'chunk')!
      const styles = Object.values(bundle).find((file) => file.type === 'asset' && file.fileName.endsWith('.css'))!
      delete bundle[styles.fileName]
      const source = String((styles as Rolldown.OutputAsset).source).trim()
      const parts = script.code.trim().split(STYLES)
      if (parts.length !== 2) throw new Error('One place for the styles was expected.')
      script.code = `${parts.join(JSON.stringify(source).replaceAll('</', '<\\/'))}\n`
      this.emitFile({ type: 'asset', fileName: 'standalone.html', source: standalone(script.code) })
    },
  }
}

/** As attributes.svelte.ts has it, in whatever quotes. */
const STYLES = /["'`]@styles["'`]/

const BARE = 'body{margin:0}'

function standalone(code: string): string {
  const script = code.replaceAll('</script', '<\\/script')
  const policy = `default-src 'none'; script-src ${hashOf(script)}; style-src ${hashOf(BARE)}; img-src data:`
  return withPolicy(readFileSync('build/standalone.html', 'utf8'), policy)
    .replace('</head>', () => `  <style>${BARE}</style>\n  </head>`)
    .replace('</body>', () => `<script>${script}</script>\n  </body>`)
}

function withPolicy(html: string, policy: string): string {
  const meta = `<meta http-equiv="Content-Security-Policy" content="${policy}" />`
  return html.replace('<meta charset="utf-8" />', (charset) => `${charset}\n    ${meta}`)
}

function hashOf(source: string): string {
  return `'sha256-${createHash('sha256').update(source).digest('base64')}'`
}

/** What the build depends on. tests/test_web_build.py computes the same. */
const SOURCES = ['build', 'index.html', 'package-lock.json', 'public', 'src', 'svelte.config.js', 'vite.config.ts']

export function hashOfSources(root: string): string {
  const hash = createHash('sha256')
  for (const name of SOURCES.flatMap((source) => files(root, source)).sort()) {
    hash.update(`${name}\0`)
    hash.update(readFileSync(join(root, name)))
    hash.update('\0')
  }
  return hash.digest('hex')
}

function files(root: string, path: string): string[] {
  if (/\.test\.ts$|^src\/testing$/.test(path)) return []
  try {
    return readdirSync(join(root, path)).flatMap((name) => files(root, `${path}/${name}`))
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOTDIR') return [path]
    throw error
  }
}
